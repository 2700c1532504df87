"""Turns source code into token shards, and reads the shards."""
