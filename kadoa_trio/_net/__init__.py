"""Everything that talks to Kadoa: HTTP, the WebSocket, frames. Knows nothing of the engine."""
