"""One module for each group of rows with a common set-up."""
