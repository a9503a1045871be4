"""The terminal dashboard: a process of its own that speaks JSON-RPC only. `tui.app` starts it."""
