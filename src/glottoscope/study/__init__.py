"""A study from its file to its run directory: settings, plan, stages, engines, and the store that knows what is complete."""
