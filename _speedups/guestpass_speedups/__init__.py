"""The compiled core: frame codec, sans-I/O tunnel session, WebSocket framing. It imports nothing else of ours."""
