"""The cache on disk: schema, writer, reader. docs/FORMAT.md is the normative text. numpy and zarr only, never torch."""
