"""What fastcache does, a package a stage. Stages meet only through files: none imports another."""
