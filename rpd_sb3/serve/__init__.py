"""The teacher service. It imports neither torch nor Stable-Baselines3, so that it installs next to any VLA."""
