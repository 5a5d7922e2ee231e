"""Every recorded result with the command that gives it. Run from the root of a clone: `python -m benchmarks.overhead.run`."""
