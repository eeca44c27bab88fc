"""The work behind each command; imported only when the command runs."""
