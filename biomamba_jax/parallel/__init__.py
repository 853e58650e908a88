"""Meshes, sharding rules by parameter path, collectives and multi-host start-up; independent of models and data."""
