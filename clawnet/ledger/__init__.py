"""The ledger (docs/LEDGER.md): chains of signed entries, the book that judges them, the purse that writes one."""
