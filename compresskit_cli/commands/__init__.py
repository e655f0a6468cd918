"""One file per subcommand, each with a click command called `command`; torch is imported inside its function."""
