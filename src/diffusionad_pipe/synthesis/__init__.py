"""The synthetic anomalies that training draws (paper, section III-D): textures, masks, foregrounds."""
