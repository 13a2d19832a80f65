"""Several processes against one: ways to spread a model over processes, and for each which features hold."""
