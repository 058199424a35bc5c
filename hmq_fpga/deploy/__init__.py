"""From a QNet to hardware; never imports torch."""
