"""The gateway: dials out to edges and serves what they open from the services that it is configured to reach."""
