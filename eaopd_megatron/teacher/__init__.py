"""Teachers: one interface, one module per placement (colocated, separate, served)."""
