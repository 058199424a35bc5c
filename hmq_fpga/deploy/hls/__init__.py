"""hls4ml: types, layers, the project and its C simulation."""
