"""The command that measures the success of a policy."""
