"""What a person sees: console, tables, browser."""
