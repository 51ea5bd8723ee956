"""The command that shows or films a policy."""
