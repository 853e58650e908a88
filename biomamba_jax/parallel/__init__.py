"""Where the work runs: what a device can do, meshes, sharding rules by parameter path, and multi-host start-up.

Stands on the ground floor: it knows `ops` and `errors`, and nothing of models, training or data.
"""
