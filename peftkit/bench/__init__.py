"""Many runs compared: a grid of them, what each recorded, statistics that say what may be concluded, and the report."""
