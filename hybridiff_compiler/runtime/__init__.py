"""Executing plans: the single-device simulator, the driver and its workers, and the watching of pipelines."""
