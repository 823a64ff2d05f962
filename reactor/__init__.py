"""Processes, event loop on C pollers, events over ZeroMQ, CPU masks, statistics, JSON-RPC."""
