"""The replicated ledger: pure, deterministic, sans-IO."""
