"""Everything that talks to Kadoa: HTTP, the WebSocket, frames. Imports nothing of the engine."""
