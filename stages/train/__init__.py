"""Stage 2: step, loop, schedule, processes and metrics."""
