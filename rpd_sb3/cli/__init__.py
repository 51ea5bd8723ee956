"""What the commands share: flags, config files, interrupts, files."""
