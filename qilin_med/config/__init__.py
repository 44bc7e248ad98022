"""Every settings file, validated before anything else happens; the paper's values; the schedule of a stage."""
