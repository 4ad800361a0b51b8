"""What every stage stands on; nothing here knows a particular stage."""
