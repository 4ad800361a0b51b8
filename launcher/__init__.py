"""Command lines: each module has main(argv) -> exit code and can be run as a script."""
