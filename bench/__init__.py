"""Every figure that we claim, one file per benchmark: python -m bench --help."""
