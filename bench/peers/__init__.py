"""The other projects' ways to do the same work: adapters over their packages, or their formula written anew."""
