"""From source code to token shards, and the shards."""
