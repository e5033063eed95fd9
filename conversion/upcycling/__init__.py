"""Dense in, expert choice out: what comes from where, initialisations, router, plan, proof."""
