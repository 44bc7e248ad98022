"""What is compared with what: our way beside other ways to do the same, on one machine, in one run."""
