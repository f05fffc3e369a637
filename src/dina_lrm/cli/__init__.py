"""The command line, `dina-lrm`: one file a command, each loaded when it is asked for."""
