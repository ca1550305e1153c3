"""One file per subcommand: options in, one library call, a view or a JSON document out."""
