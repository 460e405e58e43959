################################################################################
#
# slipway-base
#
################################################################################

# No source: it selects packages, and adjusts the root file system at the end.
SLIPWAY_BASE_LICENSE = Apache-2.0

# Mount points of the volatile directories and of the data partition. OpenSSH's
# default sshd_config reads no drop-in files; the overlay's settings are one.
define SLIPWAY_BASE_FIT_ROOT
	$(INSTALL) -d -m 0755 $(TARGET_DIR)/data $(TARGET_DIR)/boot
	$(INSTALL) -d -m 0755 $(TARGET_DIR)/etc/ssh/sshd_config.d
	grep -q '^Include /etc/ssh/sshd_config.d' $(TARGET_DIR)/etc/ssh/sshd_config || \
		$(SED) '1i Include /etc/ssh/sshd_config.d/*.conf' \
			$(TARGET_DIR)/etc/ssh/sshd_config
	$(INSTALL) -D -m 0644 $(SLIPWAY_BASE_PKGDIR)/sshd.conf \
		$(TARGET_DIR)/usr/lib/systemd/system/sshd.service.d/10-slipway.conf
	rm -f $(TARGET_DIR)/etc/ssh/ssh_host_*
endef
SLIPWAY_BASE_TARGET_FINALIZE_HOOKS += SLIPWAY_BASE_FIT_ROOT

$(eval $(generic-package))
