"""Parameters that are spread over processes: what of them is here, who does what, and everything that is sent."""
