"""Studies, comparisons and their reports. No framework is imported: adapters plug in from above."""
