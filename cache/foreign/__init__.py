"""Files of others: read as data by a process without rights, and written for others."""
