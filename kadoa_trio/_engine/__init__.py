"""What keeps the stream whole: succession of connections, ledger, buffer, saving, acknowledging, repairing."""
