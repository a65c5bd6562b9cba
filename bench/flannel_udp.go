// Flannel's userspace back end, `udp`, as it is, between two nodes. flanneld itself starts only with etcd or
// Kubernetes behind it; this gives its back end the two leases that it would read there, and nothing else.
// tests/peers.sh builds it.
//
//	flannel-udp DEVICE NETWORK OUR-RANGE OUR-ADDRESS THEIR-RANGE THEIR-ADDRESS
package main

import (
	"context"
	"errors"
	"log"
	"net"
	"os"
	"sync"

	"github.com/flannel-io/flannel/pkg/backend"
	"github.com/flannel-io/flannel/pkg/backend/udp"
	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/lease"
	"github.com/flannel-io/flannel/pkg/subnet"
)

// leases is the whole cluster: ours and theirs.
type leases struct{ ours, theirs lease.Lease }

func (l *leases) AcquireLease(context.Context, *lease.LeaseAttrs) (*lease.Lease, error) {
	return &l.ours, nil
}

func (l *leases) WatchLeases(ctx context.Context, receiver chan []lease.LeaseWatchResult) error {
	receiver <- []lease.LeaseWatchResult{{Events: []lease.Event{{Type: lease.EventAdded, Lease: l.theirs}}}}
	<-ctx.Done()
	return ctx.Err()
}

var errUnused = errors.New("the udp back end has no use for this")

func (l *leases) GetNetworkConfig(context.Context) (*subnet.Config, error) { return nil, errUnused }
func (l *leases) RenewLease(context.Context, *lease.Lease) error           { return errUnused }
func (l *leases) GetStoredMacAddresses(context.Context) (string, string)   { return "", "" }
func (l *leases) GetStoredPublicIP(context.Context) (string, string)       { return "", "" }
func (l *leases) Name() string                                             { return "two leases" }
func (l *leases) HandleSubnetFile(string, *subnet.Config, bool, ip.IP4Net, ip.IP6Net, int) error {
	return errUnused
}
func (l *leases) WatchLease(context.Context, ip.IP4Net, ip.IP6Net, chan []lease.LeaseWatchResult) error {
	return errUnused
}
func (l *leases) CompleteLease(context.Context, *lease.Lease, *sync.WaitGroup) error {
	return errUnused
}

func main() {
	if len(os.Args) != 7 {
		log.Fatal("flannel-udp DEVICE NETWORK OUR-RANGE OUR-ADDRESS THEIR-RANGE THEIR-ADDRESS")
	}
	device, err := net.InterfaceByName(os.Args[1])
	check(err)
	ours := lent(os.Args[3], os.Args[4])
	manager := &leases{ours: ours, theirs: lent(os.Args[5], os.Args[6])}
	address := ours.Attrs.PublicIP.ToIP()
	external := &backend.ExternalInterface{
		Iface: device, IfaceName: device.Name, IfaceAddr: address, ExtAddr: address,
	}
	made, err := udp.New(manager, external)
	check(err)
	config := &subnet.Config{EnableIPv4: true, Network: network(os.Args[2])}
	running, err := made.RegisterNetwork(context.Background(), &sync.WaitGroup{}, config)
	check(err)
	running.Run(context.Background())
}

func lent(pods, address string) lease.Lease {
	public := net.ParseIP(address).To4()
	if public == nil {
		log.Fatalf("%s is no IPv4 address", address)
	}
	attributes := lease.LeaseAttrs{PublicIP: ip.FromIP(public), BackendType: "udp"}
	return lease.Lease{EnableIPv4: true, Subnet: network(pods), Attrs: attributes}
}

func network(text string) ip.IP4Net {
	_, parsed, err := net.ParseCIDR(text)
	check(err)
	return ip.FromIPNet(parsed)
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
