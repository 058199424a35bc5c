"""The waist: formats, schemes, networks in integers, and their cost; numpy and the standard library only."""
