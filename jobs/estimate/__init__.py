"""What a run will take before it is begun: rates measured or given, reckoned, and simulated."""
