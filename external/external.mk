include $(sort $(wildcard $(BR2_EXTERNAL_SLIPWAY_PATH)/package/*/*.mk))
