"""What a person touches: command line, configuration, presets, console output, reports."""
