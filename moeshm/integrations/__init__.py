"""What plugs moeshm into inference engines, one module an engine; import the one you need."""
