"""The command line. One file per command, imported only when used."""
