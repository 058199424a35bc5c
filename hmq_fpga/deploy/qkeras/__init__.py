"""QKeras: an exporter and a simulator; the only importer of TensorFlow."""
