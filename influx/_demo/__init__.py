"""`influx demo`: digits with flipped labels, from data to report."""
