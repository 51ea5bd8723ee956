"""rpd_sb3: distil huge vision-language-action models into small expert policies, with Stable-Baselines3."""

__version__ = "0.1.0"
